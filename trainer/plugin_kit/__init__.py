"""Tools for plugin authors: conformance checks, templates of new plugins, and the generated docs/plugins.md."""
