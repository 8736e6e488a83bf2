"""A study of the papers' claims: five experiments, whose runs are rows of CSV files, and a page made from them."""
