"""The AdapterService: uploads, downloads, pulls and every change of the store."""
