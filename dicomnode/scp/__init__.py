"""What an association is made of, under the receiver: contexts, connections, messages."""
