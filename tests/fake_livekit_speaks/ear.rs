//! Receivers of what the fake sends: a WebSocket server that keeps every message, and an HTTP server that answers by a list.

use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::Message::Close;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With a Close frame, and its code.
    Close(Option<u16>),
    Broken,
}

#[derive(Clone, Debug, Default)]
pub struct Heard {
    pub path: String,
    pub pcm: Vec<u8>,
    /// The lengths of the binary messages.
    pub lengths: Vec<usize>,
    pub texts: Vec<String>,
    pub ended: Option<Ended>,
}

/// Takes every WebSocket, refuses those whose path has `refuse=`, and closes those of `close=` after their first message.
pub struct Ear {
    pub addr: SocketAddr,
    heard: Arc<watch::Sender<Vec<Heard>>>,
}

impl Ear {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let heard = Arc::new(watch::Sender::new(Vec::new()));
        let all = Arc::clone(&heard);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(listen(stream, Arc::clone(&all)));
            }
        });
        Self { addr, heard }
    }

    pub fn url(&self, path_and_query: &str) -> String {
        format!("ws://{}{path_and_query}", self.addr)
    }

    pub fn heard(&self) -> Vec<Heard> {
        self.heard.borrow().clone()
    }

    /// Waits until the connections satisfy the predicate.
    pub async fn until(&self, what: &str, predicate: impl Fn(&[Heard]) -> bool) {
        let mut heard = self.heard.subscribe();
        let waited = tokio::time::timeout(super::LONG, heard.wait_for(|heard| predicate(heard))).await;
        assert!(waited.is_ok(), "waited for {what}");
    }
}

#[expect(clippy::result_large_err, reason = "tungstenite's callback type")]
async fn listen(stream: TcpStream, all: Arc<watch::Sender<Vec<Heard>>>) {
    let mut path = String::new();
    let judge = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        path = request.uri().to_string();
        match path.split_once("refuse=") {
            None => Ok(response),
            Some((_, status)) => Err(Response::builder().status(status.parse::<u16>().unwrap()).header("Content-Length", 0).body(None).unwrap()),
        }
    };
    let Ok(mut socket) = accept_hdr_async(stream, judge).await else { return };
    let closes = path.contains("close=");
    let mut at = 0;
    all.send_modify(|all| {
        at = all.len();
        all.push(Heard { path, ..Heard::default() });
    });
    loop {
        let message = socket.next().await;
        let mut over = true;
        all.send_modify(|all| {
            let heard = &mut all[at];
            match &message {
                Some(Ok(Message::Binary(chunk))) => {
                    heard.lengths.push(chunk.len());
                    heard.pcm.extend_from_slice(chunk);
                    over = false;
                }
                Some(Ok(Message::Text(text))) => {
                    heard.texts.push(text.to_string());
                    over = false;
                }
                Some(Ok(Close(close))) => heard.ended = Some(Ended::Close(close.as_ref().map(|close| close.code.into()))),
                Some(Ok(_)) => over = false,
                Some(Err(_)) | None => heard.ended = Some(Ended::Broken),
            }
        });
        if over {
            return;
        }
        if closes {
            socket.close(None).await.ok();
            while let Some(Ok(_)) = socket.next().await {}
            return;
        }
    }
}

/// One request that came to a [`Door`].
#[derive(Clone, Debug)]
pub struct Knock {
    pub head: String,
    pub body: Vec<u8>,
}

impl Knock {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|line| line.split_once(": ")).find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Answers by a list of statuses, and with the last of them for ever. 0 is the end of the connection.
pub struct Door {
    pub addr: SocketAddr,
    knocks: Arc<watch::Sender<Vec<Knock>>>,
    open: Arc<watch::Sender<bool>>,
}

impl Door {
    pub async fn start(statuses: &[u16]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (knocks, open) = (Arc::new(watch::Sender::new(Vec::new())), Arc::new(watch::Sender::new(true)));
        let (seen, may_answer, statuses) = (Arc::clone(&knocks), Arc::clone(&open), statuses.to_vec());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, Arc::clone(&seen), Arc::clone(&may_answer), statuses.clone()));
            }
        });
        Self { addr, knocks, open }
    }

    /// Whether requests of the room `slow` are answered.
    pub fn open(&self, open: bool) {
        self.open.send_replace(open);
    }

    pub fn knocks(&self) -> Vec<Knock> {
        self.knocks.borrow().clone()
    }

    pub fn events(&self) -> Vec<String> {
        self.knocks().iter().map(|knock| knock.json()["event"].as_str().unwrap().to_owned()).collect()
    }
}

async fn answer(mut stream: TcpStream, knocks: Arc<watch::Sender<Vec<Knock>>>, open: Arc<watch::Sender<bool>>, statuses: Vec<u16>) {
    let mut bytes = Vec::new();
    let knock = loop {
        if stream.read_buf(&mut bytes).await.unwrap() == 0 {
            return;
        }
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let knock = Knock { head: String::from_utf8(bytes[..end].to_vec()).unwrap(), body: bytes[end + 4..].to_vec() };
        if knock.body.len() == knock.header("Content-Length").unwrap().parse::<usize>().unwrap() {
            break knock;
        }
    };
    let slow = knock.json()["room"]["name"] == "slow";
    let mut at = 0;
    knocks.send_modify(|knocks| {
        at = knocks.len();
        knocks.push(knock);
    });
    if slow {
        open.subscribe().wait_for(|open| *open).await.map(drop).unwrap();
    }
    let status = statuses[at.min(statuses.len() - 1)];
    if status != 0 {
        stream.write_all(format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes()).await.ok();
    }
}
