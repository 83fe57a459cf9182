"""The API: what a manifest may hold, and the CRDs made from it."""
