//! Requests that do not come to an end: each has its deadline, and is answered or closed.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::test_app::{ADMIN_KEY, TestApp, parse_response};

/// What the server has said when it has answered with a whole document, or has closed; `drip` goes on meanwhile, a byte each 100 ms.
async fn outcome(app: &TestApp, head: &str, drip: bool, patience: Duration) -> (Vec<u8>, Duration) {
    let (start, mut stream) = (Instant::now(), TcpStream::connect(app.addr).await.unwrap());
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let dripping = async {
        while drip && writer.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        std::future::pending::<()>().await;
    };
    let reading = async {
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            match reader.read_buf(&mut answer).await {
                Ok(0) | Err(_) => break, // a reset is an end too
                Ok(_) => {}
            }
        }
        answer
    };
    tokio::select! {
        answer = reading => (answer, start.elapsed()),
        () = dripping => unreachable!("it drips for ever"),
        () = tokio::time::sleep(patience) => panic!("{head:?}: neither answered nor closed within {patience:?}"),
    }
}

#[tokio::test]
async fn f12_what_never_ends_is_answered_or_closed_in_time() {
    let app = TestApp::builder().start().await;
    let post = |path: &str, header: &str| format!("POST {path} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: 1000\r\n\r\n");
    let webhook = post("/livekit/webhook", "Content-Type: application/webhook+json");
    let tickets = post("/api/v1/tickets", &format!("Authorization: Bearer {ADMIN_KEY}"));
    // What is sent, whether more drips behind it, what is promised, and the problem it is answered with, if it is.
    let cases = [
        ("a head that drips", "GET /health HTTP/1.1\r\nX-Slow: ", true, 5, None),
        (
            "a handshake that drips",
            "GET /egress-audio?roomName=room HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Slow: ",
            true,
            5,
            None,
        ),
        ("a head that stops", "GET /health HTTP/1.1\r\nX-Slow: ", false, 5, None),
        ("nothing at all", "", false, 5, None),
        ("a webhook that drips", &webhook, true, 5, Some((503, "bodyIncomplete"))),
        ("a webhook that stops", &webhook, false, 5, Some((503, "bodyIncomplete"))),
        ("an operator's body that drips", &tickets, true, 30, Some((408, "requestTimeout"))),
    ];
    let all = cases.into_iter().map(async |(case, head, drip, promised, problem)| {
        let (answer, took) = outcome(&app, head, drip, 4 * Duration::from_secs(promised)).await;
        println!("{case}: {took:?}, {} bytes", answer.len());
        match problem {
            Some((status, code)) => parse_response(&answer, false).assert_problem(status, code),
            None => assert!(
                ![" 200 ", " 101 "].iter().any(|good| String::from_utf8_lossy(&answer).contains(good)),
                "{case}: {:?}",
                String::from_utf8_lossy(&answer)
            ),
        }
    });
    futures_util::future::join_all(all).await;
}
