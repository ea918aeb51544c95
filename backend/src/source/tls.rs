//! TLS for sources: rustls with the ring provider, the host's certificate authorities, the configured ones, or none.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use crate::error::{SourceError, SourceErrorKind};

/// Builds the TLS configuration of a source. Reads the configured files now, the host's authorities at the first handshake.
pub(crate) fn client(skip_verify: bool, ca_cert_files: &[PathBuf]) -> Result<ClientConfig, SourceError> {
    let provider = Arc::new(ring::default_provider());
    let mut extra = Vec::new();
    for path in ca_cert_files {
        let refuse = |reason: &dyn std::fmt::Display| {
            SourceError::new(SourceErrorKind::Config, path.display().to_string(), reason)
        };
        let before = extra.len();
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| refuse(&error))? {
            extra.push(certificate.map_err(|error| refuse(&error))?);
        }
        if extra.len() == before {
            return Err(refuse(&"holds no certificate"));
        }
    }
    let trust = if skip_verify {
        Trust::Anyone
    } else {
        Trust::Authorities {
            extra,
            verifier: OnceLock::new(),
        }
    };
    let verifier = Arc::new(Verifier {
        provider: Arc::clone(&provider),
        trust,
    });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| SourceError::new(SourceErrorKind::Config, "TLS", error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(config)
}

/// Whose certificates are accepted.
#[derive(Debug)]
enum Trust {
    /// Everybody's (`skip_verify`).
    Anyone,
    /// Those that the host's or these authorities vouch for.
    Authorities {
        extra: Vec<CertificateDer<'static>>,
        verifier: OnceLock<Result<Arc<WebPkiServerVerifier>, String>>,
    },
}

#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Trust,
}

fn build(
    extra: &[CertificateDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let mut roots = RootCertStore::empty();
    let host = rustls_native_certs::load_native_certs();
    for error in &host.errors {
        tracing::warn!(%error, "certificate authorities of the host");
    }
    roots.add_parsable_certificates(host.certs);
    for certificate in extra {
        roots
            .add(certificate.clone())
            .map_err(|error| format!("configured authority: {error}"))?;
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| error.to_string())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Trust::Authorities { extra, verifier } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        match verifier.get_or_init(|| build(extra, &self.provider)) {
            Ok(verifier) => {
                let result =
                    verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
                match result {
                    // A self-signed certificate is often configured as its own authority. It was found to be valid now;
                    // what remains is whose it is.
                    Err(Error::InvalidCertificate(CertificateError::Other(reason)))
                        if reason.to_string().contains("CaUsedAsEndEntity")
                            && extra.iter().any(|trusted| trusted == end_entity) =>
                    {
                        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                        Ok(ServerCertVerified::assertion())
                    }
                    other => other,
                }
            }
            Err(reason) => Err(Error::General(reason.clone())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
