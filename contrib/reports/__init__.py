"""A receiver for what nodes post to rd.anchor.report=."""
