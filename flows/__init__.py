"""WHEN it runs: Prefect flows and the command line on top."""
