//! The HTTP server on the API socket.
