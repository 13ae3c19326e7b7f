"""What every test shares."""

from jaxtyping import install_import_hook

# Shapes and dtypes in annotations are enforced here; 2 counts as a float, as PEP 484 has it.
install_import_hook("uft.losses", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
