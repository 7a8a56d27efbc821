"""What compiled code runs on: threads and memory."""
