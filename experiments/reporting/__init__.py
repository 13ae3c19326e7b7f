"""How results become pages: tables, places for labels, one self-contained HTML file, sections of the joint report."""
