"""The papers' claims, measured: five experiments, their runs as rows of CSV files, and a page drawn from them."""
