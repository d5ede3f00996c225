"""Input purifiers: generators that map attacked inputs to clean ones, their training, and purified classifiers."""
