"""Function calling: how each model family writes calls, as parsers of its answers and grammars for them."""
