"""Reports: the results of a run in the terminal, as tables and as a page. No model is needed to write them."""
