"""One file per published system: its conditions, training loss and sampling."""
