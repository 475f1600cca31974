"""Everything that touches the device: state, compiled programs, sampling."""
