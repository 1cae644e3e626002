//! What an answer to a webhook promises, when the server dies at any moment.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use live_meeting::livekit::webhook::sign;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{event, rows};
use crate::support::test_app::{API_KEY, API_SECRET, TestApp};

const SENDERS: usize = 8;

/// Whether the event was acknowledged; a server that dies meanwhile has not.
async fn acknowledged(addr: SocketAddr, body: &str) -> bool {
    let token = sign(API_KEY, API_SECRET, body.as_bytes()).unwrap();
    let length = body.len();
    let request =
        format!("POST /livekit/webhook HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {token}\r\nContent-Length: {length}\r\n\r\n{body}");
    let Ok(mut stream) = TcpStream::connect(addr).await else { return false };
    let mut answer = Vec::new();
    let sent = stream.write_all(request.as_bytes()).await.is_ok();
    sent && stream.read_to_end(&mut answer).await.is_ok() && answer.starts_with(b"HTTP/1.1 204 ")
}

#[tokio::test]
async fn w2_every_event_that_was_acknowledged_is_in_the_ledger_after_kill_9() {
    let mut app = TestApp::builder().start().await;
    let mut promised = BTreeSet::new();
    for (round, kill_after) in [1, 7, 60].into_iter().enumerate() {
        let count = Arc::new(AtomicUsize::new(0));
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let (addr, count) = (app.addr, Arc::clone(&count));
                tokio::spawn(async move {
                    let mut promised = Vec::new();
                    for number in 0.. {
                        let id = format!("EV_{round}_{sender}_{number}");
                        let joined = json!({"id": id, "participant": {"sid": format!("PA_{id}"), "identity": "ana", "name": "Ana"}});
                        if !acknowledged(addr, &event("participant_joined", &format!("RM_{sender}"), 0, joined).to_string()).await {
                            break;
                        }
                        promised.push(id);
                        count.fetch_add(1, Relaxed);
                    }
                    promised
                })
            })
            .collect();
        while count.load(Relaxed) < kill_after {
            tokio::task::yield_now().await;
        }
        let stopped = app.kill().await;
        for sender in senders {
            promised.extend(sender.await.unwrap());
        }
        app = stopped.restart().await;
        app.settled().await;
        let quoted = promised.iter().map(|id| format!("'{id}'")).collect::<Vec<_>>().join(",");
        let people = promised.iter().map(|id| format!("'PA_{id}'")).collect::<Vec<_>>().join(",");
        for of in [
            format!("webhook_events WHERE outcome = 'applied' AND id IN ({quoted})"),
            format!("participants WHERE joined_at IS NOT NULL AND sid IN ({people})"),
            format!("transitions WHERE step = 'joined' AND cause = 'webhook' AND event_id IN ({quoted})"),
        ] {
            assert_eq!(rows(&app, &of), promised.len() as i64, "{of}");
        }
    }
    assert!(promised.len() >= 68, "{}", promised.len());
}
