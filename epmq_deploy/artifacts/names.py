"""Names of the files that every stage writes."""

MANIFEST = "manifest.json"
CARD = "README.md"
