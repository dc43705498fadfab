//! Events to sessions.
