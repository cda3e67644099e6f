import Glibc

extension ImageError {
    /// Whether an error of reading is about its place alone, so that other places of the source can
    /// still be readable. False if the server or the memory is gone.
    public var isAboutPlace: Bool {
        switch kind {
        case .system(let number): !Self.general.contains(number)
        case .corrupt: true
        case .unsupported, .invalid: false
        }
    }

    private static let general: Set<Int32> = [
        ECANCELED, ECONNABORTED, ECONNREFUSED, ECONNRESET, ENOMEM, ENOTCONN, EPIPE, EPROTO,
        ESHUTDOWN,
    ]
}
