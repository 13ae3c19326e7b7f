"""Recipes as YAML files, and the command line put over them."""

from uft.recipe import override, parse, read_yaml


def test_yaml_is_read_as_it_looks(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "on: pairs\nrate: 1e-5\nsmall: 5E-7\nyes: no\nflag: true\ndate: 2024-01-02\ncount: 1_000\n"
        "nothing:\nversion: '3'\nhalf: .5\nnegative: -3\ntime: 12:30\nall: &a {x: 1}\nmerged: {<<: *a, y: 2}\n"
    )
    assert read_yaml(str(path)) == {
        "on": "pairs", "rate": 1e-5, "small": 5e-7, "yes": "no", "flag": True, "date": "2024-01-02", "count": 1000,
        "nothing": None, "version": "3", "half": 0.5, "negative": -3, "time": "12:30", "all": {"x": 1},
        "merged": {"x": 1, "y": 2},
    }  # fmt: skip


def test_override_leaves_the_recipe_alone():
    recipe = {"objective": "dpo", "train_dataset": {"a": "a.jsonl"}, "stages": [{"name": "x"}]}
    changed = override(
        recipe, ["--objective.beta", "1e-2", "--train_dataset.a.weight=2", "--stages.0.name", "y", "--bf16"]
    )
    assert changed == {
        "objective": {"preset": "dpo", "beta": 0.01}, "train_dataset": {"a": {"path": "a.jsonl", "weight": 2}},
        "stages": [{"name": "y"}], "bf16": True,
    }  # fmt: skip
    assert recipe == {"objective": "dpo", "train_dataset": {"a": "a.jsonl"}, "stages": [{"name": "x"}]}


def test_terms_and_lists(tmp_path):
    """An objective of terms, with `on` in it, and a field that is a list."""
    (tmp_path / "a.yaml").write_text(
        "model: tiny\ntrain_dataset: {a: a.jsonl}\noutput_dir: out\nlora_target_modules: [q_proj, v_proj]\n"
        "objective:\n  sft: {loss: nll, on: demonstrations, weight: 0.5}\n  preference: {loss: dpo, beta: 1e-1}\n"
    )
    plan = parse(read_yaml(str(tmp_path / "a.yaml")))
    assert [(term.name, term.on, term.weight) for term in plan.objective.terms] == [
        ("sft", "demonstrations", 0.5),
        ("preference", "pairs", 1.0),
    ]
    assert plan.args.lora_target_modules == ["q_proj", "v_proj"]
