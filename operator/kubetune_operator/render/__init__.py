"""Pure builders of manifests and of the config file."""
