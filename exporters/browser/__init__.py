"""A static page that runs an exported graph in the browser."""
