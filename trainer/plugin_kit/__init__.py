"""Tools for plugin authors: templates for new plugins and the generated docs/plugins.md."""
