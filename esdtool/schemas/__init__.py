"""Hold the JSON Schemas, which `python -m esdtool.schemas` generates from the pydantic models."""
