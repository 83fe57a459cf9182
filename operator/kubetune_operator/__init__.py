"""The operator of kubetune and its command line."""
