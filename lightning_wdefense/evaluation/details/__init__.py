"""What a report shows beside the values: single samples, classes, the transport plan between them, and the time."""
