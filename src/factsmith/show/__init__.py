"""Turn records into pictures and pages."""
