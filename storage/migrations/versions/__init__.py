"""One module per revision, named after it; a released one is never changed."""
