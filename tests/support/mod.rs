//! What the tests share.

pub mod clients;
pub mod egress_peer;
pub mod fake_hume;
pub mod fake_livekit;
pub mod faults;
pub mod http;
pub mod livekit_proxy;
pub mod machine;
pub mod postgres_proxy;
pub mod speaker;
pub mod stalls;
pub mod strace;
pub mod test_app;
pub mod video;
