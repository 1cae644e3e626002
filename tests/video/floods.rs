//! What a sender of video cannot do to the server's memory.

use std::time::Duration;

use super::connect;
use crate::support::egress_peer::{BINARY, CONTINUATION, EgressPeer, PONG, frame};
use crate::support::machine::resident_kib;
use crate::support::test_app::TestApp;

/// What a connection may hold: three messages of 2 MiB, and what their buffers grow by.
const CONNECTION_KIB: u64 = 8 << 10;
/// What a flood of small messages may cost.
const FLOOD_KIB: u64 = 16 << 10;
const FLOOD_TIME: Duration = Duration::from_secs(2);

async fn anonymous(app: &TestApp) -> EgressPeer {
    connect(app, "/egress-video?roomName=flood&codec=vp8").await
}

#[tokio::test]
async fn i2_unfinished_messages_cost_no_more_than_their_bound() {
    let app = TestApp::builder().open().start().await;
    let before = resident_kib(app.pid());
    let (half, mut open) = (vec![7; (1 << 20) - 1], Vec::new());
    for _ in 0..10 {
        let mut peer = anonymous(&app).await;
        peer.send_raw(&frame(BINARY, false, &half, true)).await.unwrap();
        peer.send_raw(&frame(CONTINUATION, false, &half, true)).await.unwrap();
        // Its answer follows what was read before it.
        peer.ping().await.unwrap();
        assert_eq!(peer.next_frame().await.unwrap().opcode, PONG);
        open.push(peer);
    }
    let grown = resident_kib(app.pid()).saturating_sub(before);
    assert!(grown <= 10 * CONNECTION_KIB, "{grown} KiB for ten connections");
}

#[tokio::test]
async fn i2_a_flood_of_tiny_messages_is_paced_and_costs_next_to_nothing() {
    let app = TestApp::builder().open().start().await;
    let mut peer = anonymous(&app).await;
    peer.send_binary(&[0x11, 0, 0]).await.unwrap();
    let before = resident_kib(app.pid());
    let tiny = vec![frame(BINARY, true, b"x", true); 1_000].concat();
    let pour = async { while peer.send_raw(&tiny).await.is_ok() {} };
    tokio::time::timeout(FLOOD_TIME, pour).await.expect_err("it is never full");
    let grown = resident_kib(app.pid()).saturating_sub(before);
    assert!(grown <= FLOOD_KIB, "{grown} KiB");
}
