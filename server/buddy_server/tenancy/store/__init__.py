"""Tenants, keys, the audit and the ledger, in SQLite or PostgreSQL."""
