"""What scripts/table_page.py makes of the results: differences, lines of the table, and words about them."""
