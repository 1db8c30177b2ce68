"""Ready-made configurations, found by name: `ranktuner train --config=NAME`."""
