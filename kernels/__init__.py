"""The arithmetic of one BWLA layer: format, definition, ops and backends. Knows torch and nothing above it."""
