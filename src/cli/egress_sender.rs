//! Sends audio as LiveKit's egress does (`docs/FACTS.md`, egress socket): for the demonstration, and for operators who try a deployment.

use std::time::Duration;

use actix_codec::Framed;
use actix_http::ws;
use anyhow::{Context, bail};
use awc::BoxedSocket;
use awc::error::WsClientError;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::time::Instant;

use crate::analysis::tls;
use crate::livekit::egress_stream::{CONTENT_TYPE, FRAME_BYTES, FRAMES_PER_SECOND, USER_AGENT};

const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long the server may take to seal the track before its Close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(15);

/// A connection that behaves like LiveKit's egress.
pub struct EgressSender {
    connection: Framed<BoxedSocket, ws::Codec>,
    pace: Option<Pace>,
    next_ping: Instant,
}

/// An absolute schedule: what is late is caught up.
struct Pace {
    start: Instant,
    /// Times real time.
    speed: f64,
    frames: u64,
}

impl EgressSender {
    /// `speed`: times real time, or as fast as the server reads.
    ///
    /// # Errors
    /// When the server is not reached, or refuses.
    pub async fn connect(url: &str, speed: Option<f64>) -> anyhow::Result<Self> {
        let connector = awc::Connector::new().rustls_0_23(tls::client_config(None)?);
        let client = awc::Client::builder().connector(connector).finish();
        let request = client.ws(url).set_header("User-Agent", USER_AGENT).set_header("Content-Type", CONTENT_TYPE);
        let connection = match request.connect().await {
            Ok((_, connection)) => connection,
            Err(WsClientError::InvalidResponseStatus(status)) => bail!("the server refuses the connection: {status}"),
            Err(error) => bail!("the server is not reached: {error}"),
        };
        let now = Instant::now();
        let pace = speed.map(|speed| Pace { start: now, speed, frames: 0 });
        Ok(Self { connection, pace, next_ping: now + PING_INTERVAL })
    }

    /// Sends a frame of 10 ms, or a shorter last one, when its time has come.
    ///
    /// # Errors
    /// When the server has closed.
    pub async fn frame(&mut self, pcm: &[u8]) -> anyhow::Result<()> {
        if let Some(pace) = &mut self.pace {
            #[expect(clippy::as_conversions, reason = "a count of frames is exact in an f64")]
            let due = pace.start + Duration::from_secs_f64(pace.frames as f64 / f64::from(FRAMES_PER_SECOND) / pace.speed);
            pace.frames += 1;
            tokio::time::sleep_until(due).await;
        }
        let now = Instant::now();
        if now >= self.next_ping {
            self.next_ping = now + PING_INTERVAL;
            self.send(ws::Message::Ping("ping".into())).await?;
        }
        self.send(ws::Message::Binary(pcm.to_vec().into())).await
    }

    /// Sends audio, frame by frame; `progress` hears of each.
    ///
    /// # Errors
    /// When the server has closed.
    pub async fn audio(&mut self, pcm: &[u8], mut progress: impl FnMut(usize)) -> anyhow::Result<()> {
        for frame in pcm.chunks(FRAME_BYTES) {
            self.frame(frame).await?;
            progress(frame.len());
        }
        Ok(())
    }

    /// Sends a message of video when its time has come, counted from the connection's opening.
    ///
    /// # Errors
    /// When the server has closed.
    pub async fn video(&mut self, message: Bytes, due: Duration) -> anyhow::Result<()> {
        if let Some(pace) = &self.pace {
            tokio::time::sleep_until(pace.start + due.div_f64(pace.speed)).await;
        }
        self.send(ws::Message::Binary(message)).await
    }

    /// Tells the mute state as LiveKit does: at once, about 2 s before the audio that it speaks of.
    ///
    /// # Errors
    /// When the server has closed.
    pub async fn muted(&mut self, muted: bool) -> anyhow::Result<()> {
        self.send(ws::Message::Text(format!("{{\"muted\":{muted}}}").into())).await
    }

    /// Ends as LiveKit does, with a Close without a code, and waits for the server's, before which the track is sealed.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.connection.send(ws::Message::Close(None)).await?;
        let answered = async {
            while let Some(frame) = self.connection.next().await {
                if matches!(frame?, ws::Frame::Close(_)) {
                    return Ok(());
                }
            }
            bail!("the server closed without a word")
        };
        tokio::time::timeout(CLOSE_DEADLINE, answered).await.context("the server did not answer the Close")?
    }

    /// Sends, while reading what comes: a server that pings or closes is heard.
    async fn send(&mut self, message: ws::Message) -> anyhow::Result<()> {
        while let Some(frame) = futures_util::FutureExt::now_or_never(self.connection.next()) {
            match frame.context("the server closed the connection")?? {
                // The wrong answer, as LiveKit gives it: a pong should echo its ping.
                ws::Frame::Ping(_) => self.connection.send(ws::Message::Pong("pong".into())).await?,
                ws::Frame::Close(reason) => bail!("the server closed the connection: {reason:?}"),
                ws::Frame::Text(_) | ws::Frame::Binary(_) | ws::Frame::Continuation(_) | ws::Frame::Pong(_) => {}
            }
        }
        self.connection.send(message).await.context("the server closed the connection")
    }
}
