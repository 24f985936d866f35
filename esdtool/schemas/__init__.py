"""JSON Schemas shipped with the package, generated from the pydantic models (`python -m esdtool.schemas`)."""
