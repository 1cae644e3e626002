//! A WebSocket connection to a service.

use std::sync::Arc;
use std::time::Duration;

use actix_http::ws;
use awc::error::WsClientError;
use awc::http::StatusCode;
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};

use super::gate::CredentialGate;
use super::{WireFormat, WireMessage};
use crate::config::Secret;

/// The largest reply that is read; the documented ones are below 10 KiB.
const MAX_REPLY_BYTES: usize = 1 << 20;
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// The service, as all tracks share it.
#[derive(Clone)]
pub struct AnalysisService {
    pub wire: Arc<dyn WireFormat>,
    pub url: String,
    pub key: Secret,
    pub tls: Arc<rustls::ClientConfig>,
    pub gate: Arc<CredentialGate>,
    /// Audio that may wait for the service; one group may, however long it is.
    pub queue: Duration,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// 401 or 403: trying again at once is of no use.
    #[error("the key is refused with {0}")]
    KeyRefused(u16),
    #[error("{0}")]
    Failed(String),
}

/// What came.
#[derive(Debug)]
pub enum Received {
    Reply(Bytes),
    Ping(Bytes),
    /// A pong, or a part of something: a sign of life.
    Other,
    /// The other side ended it, and how.
    Ended(String),
}

pub struct ServiceConnection {
    framed: actix_codec::Framed<awc::BoxedSocket, ws::Codec>,
    /// The start of a reply that comes in fragments.
    fragments: BytesMut,
}

impl AnalysisService {
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self) -> Result<ServiceConnection, ConnectError> {
        let connector = awc::Connector::new().rustls_0_23(Arc::clone(&self.tls));
        let client = awc::Client::builder().connector(connector).finish();
        let request = client.ws(&self.url).max_frame_size(MAX_REPLY_BYTES).set_header(self.wire.key_header(), self.key.expose());
        match request.connect().await {
            Ok((_, framed)) => Ok(ServiceConnection { framed, fragments: BytesMut::new() }),
            Err(WsClientError::InvalidResponseStatus(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))) => {
                Err(ConnectError::KeyRefused(status.as_u16()))
            }
            Err(error) => Err(ConnectError::Failed(error.to_string())),
        }
    }
}

impl ServiceConnection {
    /// The next thing that comes. Nothing is lost if the caller stops waiting.
    pub async fn receive(&mut self) -> Received {
        match self.framed.next().await {
            Some(Ok(ws::Frame::Text(reply) | ws::Frame::Binary(reply))) => Received::Reply(reply),
            Some(Ok(ws::Frame::Ping(payload))) => Received::Ping(payload),
            Some(Ok(ws::Frame::Pong(_))) => Received::Other,
            Some(Ok(ws::Frame::Continuation(part))) => self.assemble(part),
            Some(Ok(ws::Frame::Close(reason))) => Received::Ended(format!("closed by the service: {reason:?}")),
            Some(Err(error)) => Received::Ended(error.to_string()),
            None => Received::Ended("the connection ended".to_owned()),
        }
    }

    fn assemble(&mut self, part: ws::Item) -> Received {
        let (bytes, is_last) = match part {
            ws::Item::FirstText(bytes) | ws::Item::FirstBinary(bytes) => {
                self.fragments.clear();
                (bytes, false)
            }
            ws::Item::Continue(bytes) => (bytes, false),
            ws::Item::Last(bytes) => (bytes, true),
        };
        if self.fragments.len() + bytes.len() > MAX_REPLY_BYTES {
            return Received::Ended("a reply is too long".to_owned());
        }
        self.fragments.extend_from_slice(&bytes);
        if is_last { Received::Reply(self.fragments.split().freeze()) } else { Received::Other }
    }

    /// # Errors
    /// When it cannot be sent within 10 s.
    pub async fn send(&mut self, message: WireMessage) -> Result<(), String> {
        self.put(match message {
            WireMessage::Text(text) => ws::Message::Text(text.into()),
            WireMessage::Binary(bytes) => ws::Message::Binary(bytes.into()),
        })
        .await
    }

    /// # Errors
    /// As [`ServiceConnection::send`].
    pub async fn ping(&mut self) -> Result<(), String> {
        self.put(ws::Message::Ping("live-meeting".into())).await
    }

    /// # Errors
    /// As [`ServiceConnection::send`].
    pub async fn pong(&mut self, payload: Bytes) -> Result<(), String> {
        self.put(ws::Message::Pong(payload)).await
    }

    /// # Errors
    /// As [`ServiceConnection::send`].
    pub async fn close(mut self) -> Result<(), String> {
        self.put(ws::Message::Close(None)).await
    }

    async fn put(&mut self, message: ws::Message) -> Result<(), String> {
        match tokio::time::timeout(SEND_DEADLINE, self.framed.send(message)).await {
            Ok(sent) => sent.map_err(|error| error.to_string()),
            Err(_) => Err("the service does not read".to_owned()),
        }
    }
}
