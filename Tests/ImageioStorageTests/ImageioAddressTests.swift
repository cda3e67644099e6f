import DiskImage
import Testing

@testable import ImageioStorage

@Suite struct ImageioAddressTests {
    @Test(arguments: [
        ("imageio://host/images/t-1", "https://host:54322/images/t-1"),
        ("imageio://host:1/images/t-1", "https://host:1/images/t-1"),
        ("imageio://[::1]/images/t-1", "https://[::1]:54322/images/t-1"),
        ("imageio://[::1]:7/images/t-1", "https://[::1]:7/images/t-1"),
        ("imageio+http://host:1/images/t-1", "http://host:1/images/t-1"),
        ("imageio+unix:///images/t-1?socket=/run/a b", "http://localhost/images/t-1"),
    ])
    func readsNames(_ name: String, _ url: String) throws {
        let address = try ImageioAddress(ImageName(name))
        #expect(address.url == url)
        #expect(!address.label.contains("t-1"), "the ticket is a secret: \(address.label)")
        #expect(address.redacted("no ticket t-1") == "no ticket …")
        #expect(address.socket == (name.contains("socket") ? "/run/a b" : nil))
    }

    @Test(arguments: [
        "imageio://host", "imageio://host/", "imageio://host/images/", "imageio:///images/t",
        "imageio+unix:///images/t", "imageio+unix://host/images/t?socket=/s",
        "imageio://host/images/t?socket=/s", "imageio://host/images/a b",
    ])
    func refusesOtherNames(_ name: String) {
        #expect(ImageioAddress.isImageio(ImageName(name)))
        #expect(throws: ImageError.self) { try ImageioAddress(ImageName(name)) }
    }

    @Test func isForPeopleOnly() {
        #expect(ImageioDriver().claims("imageio://h/images/t", isTyped: true))
        #expect(!ImageioDriver().claims("imageio://h/images/t", isTyped: false))
    }
}
