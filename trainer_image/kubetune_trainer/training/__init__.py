"""What every recipe that trains has beside its loop: it begins and ends in the same way, whatever the loss is."""
