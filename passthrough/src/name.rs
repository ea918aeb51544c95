//! Names that may reach a system call.
//!
//! Every name in a request is one component of a path. The decoder of the device refuses all others already; this
//! type repeats the check where it matters, so that no path of more than one component can be written in this crate.

use std::ffi::CStr;
use std::io;

use crate::sys::errno;

/// Longest name of a directory entry, in bytes, without the terminating NUL.
const NAME_MAX: usize = 255;

/// One path component: not empty, no `/`, neither `.` nor `..`, at most 255 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Accepts `name` or says why not: ENOENT (empty), ENAMETOOLONG, EINVAL (`.`, `..`, or contains `/`).
    pub(crate) fn new(name: &'a CStr) -> io::Result<Self> {
        match name.to_bytes() {
            b"" => Err(errno(libc::ENOENT)),
            b"." | b".." => Err(errno(libc::EINVAL)),
            bytes if bytes.len() > NAME_MAX => Err(errno(libc::ENAMETOOLONG)),
            bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
            _ => Ok(Name(name)),
        }
    }

    /// The name as the system call wants it.
    pub(crate) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_become_names() {
        for good in [c"a", c"...", c"..a", c" ", c"\xff\xfe", c".hidden", c"a\\b"] {
            assert!(Name::new(good).is_ok(), "{good:?}");
        }
        for (bad, code) in [
            (c"", libc::ENOENT),
            (c".", libc::EINVAL),
            (c"..", libc::EINVAL),
            (c"/", libc::EINVAL),
            (c"/etc", libc::EINVAL),
            (c"a/b", libc::EINVAL),
            (c"../a", libc::EINVAL),
            (c"a/", libc::EINVAL),
        ] {
            assert_eq!(Name::new(bad).unwrap_err().raw_os_error(), Some(code), "{bad:?}");
        }
    }

    #[test]
    fn names_end_at_255_bytes() {
        let longest = std::ffi::CString::new(vec![b'x'; 255]).unwrap();
        let longer = std::ffi::CString::new(vec![b'x'; 256]).unwrap();
        assert!(Name::new(&longest).is_ok());
        assert_eq!(
            Name::new(&longer).unwrap_err().raw_os_error(),
            Some(libc::ENAMETOOLONG)
        );
    }
}
