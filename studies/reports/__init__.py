"""What a study shows: tables, pictures, the page."""
