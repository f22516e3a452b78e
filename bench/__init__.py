"""Benchmarks. No figure on speed appears anywhere that a script here does not produce."""
