//! Rules by which attribute names of the guest become attribute names of the host, and back.
//!
//! A daemon without CAP_SYS_ADMIN may not set `trusted.*`, and a host that labels its own files does not want a guest's
//! `security.*`; so such names can be stored under a prefix in a namespace that the daemon may use. The text form of the
//! rules is that of virtiofsd's `xattrmap` option, so that trees which it has served can be served on.
//!
//! A rule is `:type:scope:key:prepend:`, where the first character of the text is the separator. Rules are tried in
//! order; the first whose scope and pattern match decides. Names from the guest are matched by `key`, names from the
//! host by `prepend`, both as prefixes; an empty one matches every name.
//!
//! | type | name from the guest (scope `client`) | name from the host (scope `server`) |
//! |---|---|---|
//! | `prefix` | `prepend` is put before it | `prepend` is taken off, if what is left begins with `key` |
//! | `ok` | passes as it is | passes as it is |
//! | `bad` | EPERM | hidden |
//! | `unsupported` | EOPNOTSUPP | hidden |
//!
//! Scope `all` is both. A last rule `:map:key:prepend:` stands for the set that stores names beginning with `key` (all
//! names, if that is empty) under `prepend`. A name that no rule matches is treated as `bad`.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;
use std::str::FromStr;

use crate::sys::errno;

/// The attribute that makes a program privileged; every change of the file must end it.
const CAPABILITY: &CStr = c"security.capability";
/// Where the built-in rules store what the host must not see.
const HIDDEN: &str = "user.virtiofs.";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: Action,
    client: bool,
    server: bool,
    key: String,
    prepend: String,
}

impl Rule {
    fn new(action: Action, (client, server): (bool, bool), key: &str, prepend: &str) -> Self {
        Rule {
            action,
            client,
            server,
            key: key.to_owned(),
            prepend: prepend.to_owned(),
        }
    }
}

const CLIENT: (bool, bool) = (true, false);
const SERVER: (bool, bool) = (false, true);
const ALL: (bool, bool) = (true, true);

/// An ordered set of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrRules {
    rules: Vec<Rule>,
}

/// Why a text is no set of rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XattrRulesError {
    /// The text holds no rule.
    #[error("no rule")]
    Empty,
    /// A rule ends before its last field.
    #[error("rule {number} ends before its last field")]
    Truncated {
        /// Position of the rule, from 1.
        number: usize,
    },
    /// A type is none of prefix, ok, bad, unsupported, map.
    #[error("rule {number} has the unknown type {text:?}")]
    Type {
        /// Position of the rule, from 1.
        number: usize,
        /// What stands in its place.
        text: String,
    },
    /// A scope is none of client, server, all.
    #[error("rule {number} has the unknown scope {text:?}")]
    Scope {
        /// Position of the rule, from 1.
        number: usize,
        /// What stands in its place.
        text: String,
    },
    /// More rules after a `map`.
    #[error("rule {number} is a map and not the last rule")]
    MapNotLast {
        /// Position of the map, from 1.
        number: usize,
    },
    /// A prefix that holds a NUL byte can be part of no name.
    #[error("a rule holds a NUL byte")]
    Nul,
}

impl XattrRules {
    /// Rules that keep `trusted.*` and `security.*` apart from the host's: stored as `user.virtiofs.*`, which any owner
    /// of a file may set, while the host's own are hidden and the guest cannot reach the stored ones directly.
    ///
    /// The host allows `user.*` on regular files and directories only.
    pub fn built_in() -> Self {
        XattrRules {
            rules: vec![
                Rule::new(Action::Prefix, ALL, "trusted.", HIDDEN),
                Rule::new(Action::Prefix, ALL, "security.", HIDDEN),
                Rule::new(Action::Bad, SERVER, "", "trusted."),
                Rule::new(Action::Bad, SERVER, "", "security."),
                Rule::new(Action::Bad, ALL, HIDDEN, HIDDEN),
                Rule::new(Action::Ok, ALL, "", ""),
            ],
        }
    }

    /// The host's name for the guest's `name`. EPERM, EOPNOTSUPP: a rule says so.
    pub(crate) fn to_host<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        let bytes = name.to_bytes();
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.client && bytes.starts_with(rule.key.as_bytes()));
        match rule.map(|rule| (rule.action, rule.prepend.as_bytes())) {
            Some((Action::Ok, _)) => Ok(Cow::Borrowed(name)),
            Some((Action::Prefix, prepend)) => {
                let stored = CString::new([prepend, bytes].concat());
                stored.map(Cow::Owned).map_err(|_| errno(libc::EINVAL))
            }
            Some((Action::Unsupported, _)) => Err(errno(libc::EOPNOTSUPP)),
            Some((Action::Bad, _)) | None => Err(errno(libc::EPERM)),
        }
    }

    /// The guest's name for the host's `name`, if the guest may know of it.
    pub(crate) fn to_guest<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        for rule in self.rules.iter().filter(|rule| rule.server) {
            let Some(rest) = name.strip_prefix(rule.prepend.as_bytes()) else {
                continue;
            };
            match rule.action {
                Action::Ok => return Some(name),
                Action::Bad | Action::Unsupported => return None,
                Action::Prefix if rest.starts_with(rule.key.as_bytes()) => return Some(rest),
                Action::Prefix => {}
            }
        }
        None
    }

    /// What file capabilities are stored as, if that is something else than what the host's kernel knows and clears.
    pub(crate) fn stored_capability(&self) -> Option<CString> {
        match self.to_host(CAPABILITY) {
            Ok(Cow::Owned(name)) => Some(name),
            _ => None,
        }
    }
}

impl FromStr for XattrRules {
    type Err = XattrRulesError;

    /// The rules of a text, or [`XattrRules::built_in`] if it is `built-in`.
    fn from_str(text: &str) -> Result<Self, XattrRulesError> {
        if text.trim_ascii() == "built-in" {
            return Ok(Self::built_in());
        }
        if text.contains('\0') {
            return Err(XattrRulesError::Nul);
        }
        let mut rules = Vec::new();
        let mut left = text.trim_ascii();
        let mut number = 0;
        while let Some(separator) = left.chars().next() {
            number += 1;
            let mut fields = left.get(separator.len_utf8()..).unwrap_or("").split(separator);
            let mut field = || fields.next();
            let truncated = XattrRulesError::Truncated { number };
            let kind = field().ok_or_else(|| truncated.clone())?;
            let map = kind == "map";
            let scope = if map {
                "all"
            } else {
                field().ok_or_else(|| truncated.clone())?
            };
            let (key, prepend) = (
                field().ok_or_else(|| truncated.clone())?,
                field().ok_or_else(|| truncated.clone())?,
            );
            let scope = match scope {
                "client" => CLIENT,
                "server" => SERVER,
                "all" => ALL,
                other => {
                    return Err(XattrRulesError::Scope {
                        number,
                        text: other.to_owned(),
                    });
                }
            };
            // The separator after the last field is part of the rule.
            let rest = fields.next().ok_or(truncated)?;
            left = text_from(left, rest).trim_ascii_start();
            let action = match kind {
                "prefix" => Action::Prefix,
                "ok" => Action::Ok,
                "bad" => Action::Bad,
                "unsupported" => Action::Unsupported,
                "map" if !left.is_empty() => return Err(XattrRulesError::MapNotLast { number }),
                "map" => {
                    rules.extend(map_rules(key, prepend));
                    break;
                }
                other => {
                    return Err(XattrRulesError::Type {
                        number,
                        text: other.to_owned(),
                    });
                }
            };
            rules.push(Rule::new(action, scope, key, prepend));
        }
        if rules.is_empty() {
            Err(XattrRulesError::Empty)
        } else {
            Ok(XattrRules { rules })
        }
    }
}

/// The part of `whole` from where its slice `part` begins.
fn text_from<'a>(whole: &'a str, part: &'a str) -> &'a str {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    whole.get(start..).unwrap_or("")
}

fn map_rules(key: &str, prepend: &str) -> Vec<Rule> {
    let mut rules = vec![Rule::new(Action::Prefix, ALL, key, prepend)];
    if key.is_empty() {
        rules.push(Rule::new(Action::Bad, ALL, "", ""));
    } else {
        rules.push(Rule::new(Action::Bad, SERVER, "", key));
        rules.push(Rule::new(Action::Bad, CLIENT, prepend, ""));
        rules.push(Rule::new(Action::Ok, ALL, "", ""));
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> XattrRules {
        text.parse().unwrap()
    }

    fn host(rules: &XattrRules, name: &CStr) -> Result<String, i32> {
        match rules.to_host(name) {
            Ok(name) => Ok(name.to_str().unwrap().to_owned()),
            Err(error) => Err(error.raw_os_error().unwrap()),
        }
    }

    fn guest(rules: &XattrRules, name: &str) -> Option<String> {
        rules
            .to_guest(name.as_bytes())
            .map(|name| String::from_utf8(name.to_vec()).unwrap())
    }

    #[test]
    fn everything_can_be_stored_under_a_prefix() {
        let all = rules(":prefix:all::user.virtiofs.::bad:all:::");
        assert_eq!(host(&all, c"trusted.a").as_deref(), Ok("user.virtiofs.trusted.a"));
        assert_eq!(
            guest(&all, "user.virtiofs.trusted.a").as_deref(),
            Some("trusted.a")
        );
        assert_eq!(guest(&all, "security.selinux"), None);
        assert_eq!(rules(":map::user.virtiofs.:"), all);
    }

    #[test]
    fn one_namespace_can_be_stored_under_a_prefix() {
        let trusted = rules(
            "/prefix/all/trusted./user.virtiofs./ /bad/server//trusted./ /bad/client/user.virtiofs.// /ok/all///",
        );
        assert_eq!(rules("/map/trusted./user.virtiofs./"), trusted);
        assert_eq!(
            host(&trusted, c"trusted.a").as_deref(),
            Ok("user.virtiofs.trusted.a")
        );
        assert_eq!(host(&trusted, c"user.a").as_deref(), Ok("user.a"));
        assert_eq!(host(&trusted, c"user.virtiofs.trusted.a"), Err(libc::EPERM));
        assert_eq!(
            guest(&trusted, "user.virtiofs.trusted.a").as_deref(),
            Some("trusted.a")
        );
        assert_eq!(guest(&trusted, "trusted.a"), None);
        assert_eq!(guest(&trusted, "user.a").as_deref(), Some("user.a"));
    }

    #[test]
    fn the_built_in_rules_keep_guest_and_host_apart() {
        let rules = XattrRules::built_in();
        for name in [
            c"trusted.overlay.opaque",
            c"security.selinux",
            c"security.capability",
        ] {
            let stored = host(&rules, name).unwrap();
            assert_eq!(stored, format!("user.virtiofs.{}", name.to_str().unwrap()));
            assert_eq!(guest(&rules, &stored).as_deref(), name.to_str().ok());
            assert_eq!(
                guest(&rules, name.to_str().unwrap()),
                None,
                "the host's own is hidden"
            );
        }
        assert_eq!(
            host(&rules, c"user.virtiofs.security.capability"),
            Err(libc::EPERM)
        );
        assert_eq!(guest(&rules, "user.virtiofs.user.x"), None);
        assert_eq!(
            host(&rules, c"system.posix_acl_access").as_deref(),
            Ok("system.posix_acl_access")
        );
        assert_eq!(
            rules.stored_capability().as_deref(),
            Some(c"user.virtiofs.security.capability")
        );
    }

    #[test]
    fn scopes_and_refusals() {
        let rules = rules(":bad:client:secret.:::unsupported:all:system.:system.::ok:client:user.::");
        assert_eq!(host(&rules, c"secret.a"), Err(libc::EPERM));
        assert_eq!(host(&rules, c"system.posix_acl_access"), Err(libc::EOPNOTSUPP));
        assert_eq!(guest(&rules, "system.posix_acl_access"), None);
        assert_eq!(host(&rules, c"user.a").as_deref(), Ok("user.a"));
        assert_eq!(host(&rules, c"trusted.a"), Err(libc::EPERM), "no rule matches");
        assert_eq!(guest(&rules, "user.a"), None, "no rule for names of the host");
        assert_eq!(rules.stored_capability(), None);
    }

    #[test]
    fn broken_rules_are_named() {
        let error = |text: &str| text.parse::<XattrRules>().unwrap_err();
        assert_eq!(error(""), XattrRulesError::Empty);
        assert_eq!(error("  "), XattrRulesError::Empty);
        assert_eq!(error(":ok:all:"), XattrRulesError::Truncated { number: 1 });
        assert_eq!(error(":ok:all::"), XattrRulesError::Truncated { number: 1 });
        assert_eq!(
            error(":ok:all::::bad:all"),
            XattrRulesError::Truncated { number: 2 }
        );
        assert_eq!(
            error(":fine:all:::"),
            XattrRulesError::Type {
                number: 1,
                text: "fine".into()
            }
        );
        assert_eq!(
            error(":ok:some:::"),
            XattrRulesError::Scope {
                number: 1,
                text: "some".into()
            }
        );
        assert_eq!(
            error(":map::user.:\n:ok:all:::"),
            XattrRulesError::MapNotLast { number: 1 }
        );
        assert_eq!(error(":ok:all:\0::"), XattrRulesError::Nul);
    }
}
