"""Names of files in the folders of stages."""

MANIFEST = "manifest.json"
CARD = "README.md"
EVAL_FILE = "eval.json"
