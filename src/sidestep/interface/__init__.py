"""All that a method's file imports: sites, taps, layers, configs, and the classes that methods are made of."""
