//! TLS for the connections that this server opens.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

/// Mozilla's roots, and those of a PEM file where one is configured.
///
/// # Errors
/// When the file cannot be read or holds no usable certificate.
pub fn client_config(ca_file: Option<&Path>) -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {problem}", path.display()));
        let before = roots.len();
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| invalid(error.to_string()))? {
            roots.add(certificate.map_err(|error| invalid(error.to_string()))?).map_err(|error| invalid(error.to_string()))?;
        }
        if roots.len() == before {
            return Err(invalid("there is no certificate in it".to_owned()));
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // WebSockets need HTTP/1.1; awc would offer HTTP/2 first.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "hello").expect("written");
        let error = client_config(Some(file.path())).expect_err("refused");
        assert!(error.to_string().contains("there is no certificate in it"), "{error}");
        client_config(Some(Path::new("/no/such/file"))).expect_err("refused");
        client_config(None).expect("Mozilla's roots");
    }
}
