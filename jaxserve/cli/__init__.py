"""The `jaxserve` command; each subcommand is a module with `main(argv) -> exit code`, imported when named."""
