"""The sections of a study file. Their descriptions become the JSON schema."""
