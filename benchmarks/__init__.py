"""Benchmarks, one file a subject: `python -m benchmarks.<subject>`, see docs/benchmarks.md. Not in the wheel."""
