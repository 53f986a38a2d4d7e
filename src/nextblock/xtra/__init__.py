"""XTRA: pre-train a vision encoder by predicting the next cell."""
