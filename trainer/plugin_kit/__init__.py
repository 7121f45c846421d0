"""For authors of plugins: conformance checks, templates, the page of plugins."""
